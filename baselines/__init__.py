"""Methods of other papers: one package per paper; the packages do not import each other."""
