def with_keyword(prompts, completions, solution):
    return [float(right in text) for right, text in zip(solution, completions, strict=True)]


def trl_style(prompts, completions, **columns):
    return [
        float(right in text) for right, text in zip(columns["solution"], completions, strict=True)
    ]
