"""VMamba-Tiny: network, teacher and the selective scan."""
