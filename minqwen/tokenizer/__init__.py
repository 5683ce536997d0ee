"""Text to token ids and back, and chats to prompts.

tokenizer.py is what callers use. Two libraries cut texts into tokens (backends.py); added tokens
such as <|im_end|> are found before that (added_tokens.py). chat.py makes a prompt of messages, and
chat_template.py renders the template in a process of its own.
"""

from minqwen.tokenizer.tokenizer import IncrementalDecoder, Tokenizer

__all__ = ["IncrementalDecoder", "Tokenizer"]
