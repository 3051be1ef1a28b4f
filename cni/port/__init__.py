"""The port of an attachment: what may pass between its guest and the wire, and how much of it."""
