"""How good scores are: metrics, protocols, comparisons, and one model judged on one task."""
