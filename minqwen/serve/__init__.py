"""An OpenAI-compatible server: one engine whose steps many clients share.

`requests.py` says what may be asked. `loop.py` runs the engine in a thread of its own, and
`worker.py` does so on every rank. `front.py` brings requests and engine together, `completions.py`
and `chat.py` write the answers, `app.py` has the addresses, `server.py` starts and ends it all. It
needs the extra [serve].
"""
