"""Makes the report page: reads runs, packs their videos, fills one HTML template."""
