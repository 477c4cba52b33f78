"""A reward function that config files can name."""


def letters(prompts, completions):
    """The number of different letters in each completion."""
    return [float(len(set(completion))) for completion in completions]
