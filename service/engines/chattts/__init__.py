"""ChatTTS: its weights, tokenizer, speakers and vocoder, under a decode loop of our own."""
