"""Services as one nftables table for each IP family."""
