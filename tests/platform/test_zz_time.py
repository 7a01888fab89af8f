import time, subprocess, sys
def test_a(ray_cluster, tmp_path):
    (tmp_path/"a.py").write_text("print('hi')"); (tmp_path/"pyproject.toml").touch()
    for cwd, args in ((tmp_path,["a.py"]),)*3 + (("/work/main",["jobs/deta_r50.py","--help"]),)*2 + ((tmp_path,["--no-wait","a.py"]),):
        t=time.time()
        r=subprocess.run([sys.executable,"-m","deta.jobs.cli","submit",*args],cwd=cwd,env=ray_cluster.env|{"PYTHONPATH":"/work/main"},capture_output=True,text=True)
        print(args, round(time.time()-t,1), r.returncode, r.stderr.splitlines()[:1])
