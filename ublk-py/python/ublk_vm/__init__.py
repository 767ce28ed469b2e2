"""Runs programs and tests on real Linux kernels in QEMU."""
