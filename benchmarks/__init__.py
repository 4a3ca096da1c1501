"""What is measured, and how: ``python -m benchmarks OUT.json`` (see README.md beside this file).

Everything is measured side by side in one process. Importing a module here compiles nothing and
needs no GPU; the backend is not imported before a side of ours runs, for it changes Dynamo's
settings, and torch.compile must be measured with its own.
"""
