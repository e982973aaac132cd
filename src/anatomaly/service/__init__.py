"""One detector behind HTTP: sessions of normal images, queries against them, a page, and a PACS."""
