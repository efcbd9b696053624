"""Makes and draws masks: the radial rule, other patterns, wanted densities."""
