"""Can two attachments of the node reach each other, and why not? gather.py looks up facts.py; verdict.py judges.

Must not send a frame, and must not change anything.
"""
