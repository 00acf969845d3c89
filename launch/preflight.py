"""Is this machine ready for `make setup`? One line for each thing that is missing; exit code 2 if there is any.

Plain Python, as old as 3.6: it runs before anything is installed.
"""

import os
import shutil
import sys
import sysconfig

WANTED = (3, 11)


def missing():
    if sys.version_info < WANTED:
        yield "Python %d.%d is too old: wanted %d.%d or newer; set PYTHON3=/path/to/one" % (
            sys.version_info[:2] + WANTED
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        yield "python3 cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"
    if shutil.which("g++") is None:
        yield "no g++, with which DeepSpeed compiles its communication on CPUs; on Debian and Ubuntu: apt install g++"
    if not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")):
        yield "no Python.h, which g++ needs for that; on Debian and Ubuntu: apt install python3-dev"


problems = list(missing())
for problem in problems:
    sys.stderr.write("setup: %s\n" % problem)
sys.exit(2 if problems else 0)
