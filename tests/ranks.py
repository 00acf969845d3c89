"""One rank of a test: calls MODULE:FUNCTION(world, **arguments) and leaves every rank's result in one JSON file."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from pvtcap.dist import World
from pvtcap.processes import leave


def main(function: str, arguments: str, out: str) -> None:
    module, name = function.split(":")
    with World.start() as world:
        result = getattr(importlib.import_module(module), name)(world, **json.loads(arguments))
        results = world.gather(result)
        if results is not None:
            Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
