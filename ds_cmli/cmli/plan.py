from typing import NamedTuple
import torch
class Plan(NamedTuple):
    text_rows:int; texts:int; image_rows:int; images:int
    def load_buffers(self, like):
        D=like.shape[1]; dt=torch.promote_types(like.dtype, torch.float32)
        class B: pass
        b=B(); r=max(self.text_rows,self.image_rows)
        b.image=(like.new_empty(r,D), like.new_empty(r,D,dtype=dt)); b.text=(like.new_empty(r,D), like.new_empty(r,D,dtype=dt)); return b
def make_plan(I,J,N,M,D,dtype,scratch_bytes):
    i=max(1,3136//N)
    return Plan(max(512,M),64,i*N,i)
