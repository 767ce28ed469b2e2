"""Runs tests, a demo and benchmarks on real kernels: in QEMU, or on a host that has ublk."""
