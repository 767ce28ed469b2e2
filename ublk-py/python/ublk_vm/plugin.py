"""The pytest plugin behind `--ublk-vm`."""
