"""The connection to the kernel (protocol, supervisor, front, tuning). Knows no model, chunk or bucket."""
