"""The one exception that means: the input is wrong and the message says what to do about it."""


class UserError(RuntimeError):
    """Wrong input, data or files. The message is one sentence naming the culprit and the remedy.

    Entry points print it without a traceback and exit with status 2; anything else is a bug and keeps its traceback.
    """


class InterruptedBySignalError(BaseException):
    """A signal asked for an end; what was done is on disk, and the same command continues.

    Like KeyboardInterrupt it is no `Exception`, which libraries catch and take for a failure of their own.

    Args:
        signum: of the signal; the process ends with status 128 + signum, as shells expect.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum
