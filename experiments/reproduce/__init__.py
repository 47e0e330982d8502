"""All figures and claims of the paper, made again."""
