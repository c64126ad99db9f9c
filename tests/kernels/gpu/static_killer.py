"""A module that ends the process which imports it, as the system does when memory runs out."""

import os
import signal

os.kill(os.getpid(), signal.SIGKILL)
