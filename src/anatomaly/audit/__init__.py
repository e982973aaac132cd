"""The same maps under the sound and the published evaluations: what the difference between the figures is made of."""
