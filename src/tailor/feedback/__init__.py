"""What a server was asked, what people say about its answers, and the data sets that the two become."""
