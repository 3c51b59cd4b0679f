"""The one exception for mistakes that the user can mend."""


class UserError(ValueError):
    """A mistake in the user's input, config or surroundings.

    Its message is all that the command line prints, so it says what was wrong, with the values, and what to do.
    """
