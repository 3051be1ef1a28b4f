"""Attachments as transactions: ADD, DEL, CHECK, GC and STATUS, each of which undoes what it cannot finish.

Must not read the environment, print, or know how a request arrived.
"""
