import os

calls = 0


def flaky(prompts, completions):
    global calls
    calls += 1
    if calls == 6 and not os.path.exists(os.environ["FLAG"]):
        open(os.environ["FLAG"], "w").close()
        raise TimeoutError("reward service did not answer")
    return [float(len(text)) for text in completions]
