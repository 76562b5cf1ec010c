"""Launch recipes: the files of recipes/, checked and turned into commands."""
