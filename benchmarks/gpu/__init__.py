"""The GPU suite: everything that is measured on a device, restartable, in one command."""
