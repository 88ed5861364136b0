"""Reading ahead and computing in full calls, for many videos in a row.

reading.py  a video's sampled and preprocessed frames
workers.py  threads that read ahead, in order and within bounds
calls.py    full calls of a graph across videos
"""
