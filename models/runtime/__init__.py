"""What every fork shares while a model runs."""
