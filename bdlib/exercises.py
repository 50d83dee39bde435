"""What the student versions of the notebooks stand on: a cell that is not solved yet says so in one sentence."""


class NotSolved(Exception):
    """Ends a cell that waits for a student's code: Run All stops there, with this message in place of a stack of calls."""

    MESSAGE = (
        "Not solved yet. Write your code in this cell, in place of the three lines that end with `raise NotSolved`, "
        "run it with Shift+Enter, then go on with Run > Run Selected Cell and All Below."
    )

    def __str__(self) -> str:
        return self.MESSAGE

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of the stack of calls."""
        return [self.MESSAGE]
