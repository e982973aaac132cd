"""Public data sets of the field, from their original downloads to a manifest."""
