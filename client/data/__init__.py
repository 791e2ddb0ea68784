"""A client's own data: found (sources), read (readers, stdlib), encoded (formats, chat, classes), packed, batched."""
