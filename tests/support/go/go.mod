module etcdinit/tests/support/go

go 1.24
