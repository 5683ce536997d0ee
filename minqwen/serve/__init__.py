"""An OpenAI-compatible server: one engine whose steps many clients share.

`requests.py` says what may be asked, `loop.py` runs the engine in a thread of its own, `front.py`
brings the two together, `completions.py` and `chat.py` write the answers, `app.py` has the
addresses, and `server.py` starts and ends it all. It needs the extra [serve].
"""
