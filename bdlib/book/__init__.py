"""The book: notebooks, README, glossary and guides as a static site that needs no network.  `python -m bdlib.book`."""
