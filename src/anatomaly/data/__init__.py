"""Files, tables and synthetic images."""
