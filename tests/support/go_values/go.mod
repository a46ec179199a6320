module etcdinit/govalues

go 1.24
