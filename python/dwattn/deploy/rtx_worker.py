"""The process that :mod:`dwattn.deploy.rtx` starts: a request on stdin, the answer in a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dwattn.deploy.builder import build
from dwattn.deploy.commands import notes
from dwattn.deploy.options import BuildOptions
from dwattn.errors import DeployError
from dwattn.files import stopped_in_order


def main() -> None:
    """Build once, and answer with the engine's record or the error."""
    request = json.load(sys.stdin)
    answer: dict[str, Any]
    try:
        options = BuildOptions.from_dict(request["options"])
        with stopped_in_order(), notes():
            answer = {"record": build(options, show_progress=request["progress"]).to_dict()}
    except DeployError as error:
        answer = {"error": str(error)}
    except KeyboardInterrupt:
        answer = {"interrupted": True}
    Path(request["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
