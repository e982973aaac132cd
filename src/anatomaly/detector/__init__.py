"""A model ready to judge images: bundles, banks, calibration, and the official checkpoints."""
