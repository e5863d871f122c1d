"""Pages of docs/ that are made from the code that they describe, and how MkDocs is told of the rest."""
