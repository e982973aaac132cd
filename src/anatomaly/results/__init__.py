"""What the folder given as --out holds."""
