"""The mechanism: Poisson sampling, clipping, noise, and the step that releases a gradient."""
