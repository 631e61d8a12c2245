"""Benchmarks of the library itself (`run.run` measures them all), and Stable Diffusion 3.5 with
random weights, for where none can be downloaded."""
