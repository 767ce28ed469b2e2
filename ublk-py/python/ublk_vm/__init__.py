"""Runs programs and tests on real Linux kernels in QEMU; `pytest --ublk-vm=7.3` is its front door.

Pytest is not to rewrite its assertions, which would have to happen before the guest's half imports it:
PYTEST_DONT_REWRITE
"""
