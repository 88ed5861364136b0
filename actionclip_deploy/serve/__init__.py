"""The server: batched clip scoring over HTTP, with label banks that change while it runs.

Importing this package imports no web framework: the decoding processes run without one.
"""
