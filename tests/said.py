"""What a command says on stderr."""

import re

_PROGRESS = re.compile(r"(.* \.\.\.|\w+: step \d+ of \d+, .* so far, .* left)\n")


def errors(err):
    """Everything but stages and steps."""
    return "".join(line for line in err.splitlines(keepends=True) if not _PROGRESS.fullmatch(line))
