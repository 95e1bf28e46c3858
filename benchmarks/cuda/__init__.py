"""`python -m benchmarks.cuda`: what needs a GPU, in parts, each alone by its name.

Models have the shapes of SmolLM2-135M, Llama 3.2 1B and Llama 3.1 8B and random weights, which are
drawn on the device: speed and memory do not ask what they say.
"""
