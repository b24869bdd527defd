"""What has changed on a ticket's entries: kept, applied, reverted, and exchanged with LT-SFT."""
