"""The Triton kernels and their launchers: one file an op, and what they share. Importing this imports no Triton."""
